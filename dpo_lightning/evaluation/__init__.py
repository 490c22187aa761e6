"""What a policy is worth: reward against KL, win rates, agreement of judges."""
