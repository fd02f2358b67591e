"""The page "against the paper": what was published beside what was measured here."""
