"""One box behind a URL: OpenAI's and A1111's routes, a page, and batches shared by whoever asks at the same time."""
