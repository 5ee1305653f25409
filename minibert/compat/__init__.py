"""What is accepted so that scripts and files written for transformers work; nothing of it is BERT."""
