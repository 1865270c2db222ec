"""The planner: what a config takes of a machine that is not there, by compiling its programs for it."""
