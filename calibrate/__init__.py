"""Which numbers are stored, judged by data: layer-wise GPTQ, fine-tuning, sensitivities, size budgets."""
