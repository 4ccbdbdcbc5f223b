"""Which of Data, Algorithm and Machine binds a run, proved by experiment."""
