"""What every room rests on: events, text for people, the machine and its memory."""
