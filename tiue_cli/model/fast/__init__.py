"""The networks of a pass as a GPU likes them: channels-last, few launches, nothing fetched from the host."""
