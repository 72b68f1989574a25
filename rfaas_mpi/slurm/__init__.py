"""What the batch system says (facts), who gets which cores of a job (layout), and the two steps of a job (run)."""
