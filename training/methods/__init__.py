"""Methods: each file is a frozen config and the pure computation of its losses."""
