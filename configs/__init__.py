"""One file per method; base.py holds what no method decides."""
