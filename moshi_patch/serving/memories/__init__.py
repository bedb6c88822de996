"""What each person has taught, kept in a store: generations, sealed or plain, read and written off the tick."""
