"""The results store: one immutable Parquet file per finished contest."""
