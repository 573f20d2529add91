"""The mission's experiments: the plan, what runs it, what it comes to."""
