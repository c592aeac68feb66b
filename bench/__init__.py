"""Benchmarks: what the verbs cost beside the matrix products that nothing can avoid, and beside other libraries.

    python -m pytest bench --benchmark-only                    one row per verb, backend, dtype and mode
    python -m bench.side_by_side --out bench/results/FILE.json ours, torch and peers in alternation, on the same inputs
    python -m bench.methods_page --out FILE.json               what the runs of docs/methods.md print
    python -m bench.plots && python -m bench.render            the pages' pictures and tables, from bench/results/
    bench/gpu.sh                                               all of it on a machine with a GPU, in one call

No test is timed and no benchmark is trusted: each checks its result against float64 before the clock starts.
"""
