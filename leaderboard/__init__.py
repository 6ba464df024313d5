"""What records mean together: tables, intervals and their verification."""
