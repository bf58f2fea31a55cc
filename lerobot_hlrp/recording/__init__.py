"""Recording scripted experts into LeRobotDatasets: environments, episodes, the dataset on disk, and the session."""
