"""Training a stream: one fit per task, what is kept to resume, and its metrics."""
