"""What images say of how they were made, read and told."""
