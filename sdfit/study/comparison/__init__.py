"""What others predict and what others measured, beside sdfit."""
