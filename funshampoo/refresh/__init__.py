"""What is computed now and then: the schedule, the threads, what is kept."""
