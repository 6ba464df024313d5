"""For authors of methods and datasets: a file to start from, and the checks that it keeps the contract."""
