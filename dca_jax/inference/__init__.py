"""From a checkpoint to text: loading, generation, chat, documents, scores."""
