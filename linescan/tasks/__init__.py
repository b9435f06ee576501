"""One file a task: its training side (batch -> losses; scores) and its user side (files in, answers out)."""
