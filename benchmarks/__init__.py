"""Speed claims, one file each, always as a ratio against a named peer measured in the same run.

    python -m benchmarks.encode [--json]

Agreement is checked before anything is timed; a contender that does not agree is printed as wrong, not as fast.
"""
