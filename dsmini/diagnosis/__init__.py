"""Find the one of Data, Algorithm and Machine that binds a run, proved by experiment."""
