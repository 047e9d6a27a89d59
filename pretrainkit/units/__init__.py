"""One work unit of a plan -> its chunks and its commit record: what every executor runs on every worker.

runner        reads, encodes and publishes one unit
boundaries    the BOS and EOS ids that mark each document
chunks        token arrays -> chunk files of bounded size
nodes         the folders that the nodes' units share: what is finished, what is swept, the index of each
work          what travels between driver and workers: the job, a unit's result
"""
