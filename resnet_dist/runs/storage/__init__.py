"""The place where runs lie: a folder or a bucket, behind one interface. Nothing above asks which of the two it is.

protocol        the interface: objects, logs, and folders of files that appear at once
open            choose the implementation by the location
folder          a folder that all nodes share
folder_check    a check before a run begins that it can write all of its files there
folder_bundles  its folders of files: written aside and renamed
bucket          an object store: s3://, gs://, az://
bucket_bundles  its folders of files: uploaded with the file that commits them last, fetched once per node
client          the calls to an object store, its retries, and its errors in words
scratch         the local folder that uploads and downloads pass through
logs            append-only logs: a file, or numbered segments
lease           the right to write to a run: one holder, a heartbeat, and an end for holders that died
holder          the process that holds a lease
"""
