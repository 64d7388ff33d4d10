"""The compiler: results to verdicts, to an intermediate form, to a generated Python module."""
