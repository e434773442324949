"""What a run tells about itself: metrics, timeline, live view, samples, summary and report."""
