"""One page from result files: pictures, tables, curves, provenance."""
