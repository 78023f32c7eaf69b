"""Loading checkpoints, generation, chat, document questions and scoring."""
