"""All that has to be known of a GPU, in one run of less than nine minutes: `make device`.

    python -m benchmarks.device                  on the GPU
    python -m benchmarks.device --rehearse       the same code with small sizes on a CPU

One JSON line a measurement, as soon as there is one, the most valuable first. Every group is a
process of its own that is ended at its limit, so that none takes the others along. Needs torch and
optree alone; pytest for the tests.
"""
