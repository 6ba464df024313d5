"""What a finished run's model looks at and tells apart; for people, never for methods: true labels are used freely."""
