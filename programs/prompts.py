"""What a question is wrapped in before the model's own chat template renders it."""

MATH_PROMPT = r"""{question}

Please reason step by step, and put your final answer within \boxed{{}}."""
"""For `str.format(question=...)`; raw, since `\b` would be a backspace."""
