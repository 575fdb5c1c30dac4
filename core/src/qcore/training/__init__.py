"""`qcore train`: rows and a base to a PEFT adapter."""
