"""What runs a Workload and says how much memory it took: a card, a trace, or a made-up card."""
