"""The contract, trees, checks, the clock and the modes: what everything else stands on."""
