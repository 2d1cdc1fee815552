"""Distillation: losses between a student and its teacher, teachers, and one training loop."""
