"""What each verb can be asked: one file a verb, none of which imports torch."""
