"""The runs that are compared between one and two processes: name → algorithm, further overrides."""

SCENARIOS = {
    "two_critics": ["two_critics"],
    "two_critics_on_trunk": ["two_critics", "critic=head"],
    "resized": ["resized"],
    "contrastive": ["contrastive", "algo.contrast_count=4"],
    "hindsight": ["hindsight"],
    "resets": ["resets_ppo"],
    "offline_apa": ["offline_apa"],
    "ilql": ["ilql"],
    "a2po": ["a2po"],
    "reference_text": ["reference_text"],
    "offline_dpo": ["offline_dpo"],
}
