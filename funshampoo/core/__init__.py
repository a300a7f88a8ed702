"""The foundation: the contract, trees, checks, the clock and the modes."""
