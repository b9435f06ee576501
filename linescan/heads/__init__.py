"""What turns features into answers, one folder a task."""
