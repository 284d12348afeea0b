"""What asks for a report."""

# Training draws one a row and epoch; evaluation and the command line take the first, as the paper's evaluation does.
REPORT_PROMPTS = (
    "Can you summarize with findings the images presented?",
    "Write the report of this CT scan.",
    "What does this chest CT show?",
    "Describe the findings of this examination.",
)
