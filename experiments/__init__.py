"""Questions asked of the methods, one folder each."""
