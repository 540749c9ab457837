"""The repository of published snapshots: signed manifests over chunks that are named by their content.

The same layout in a directory and in a bucket::

    chunks/v2/<2 hex>/<64 hex>  a chunk, compressed and perhaps encrypted
    snapshots/<id>/manifest     the signed document; a snapshot exists when this does
    deleted/<id>/<digest>       a tombstone: the document of a deleted snapshot, kept for the grace time
    damaged/<64 hex>            marks a chunk that was found damaged, until it is sent again
    tmp/<name>                  objects that are being written; a prune removes those of killed writers

How it is used::

    store = RemoteStore(objects, signer, trusted, wrapper=None, workers=8, grace=timedelta(hours=24))
    key = store.new_key("s1")                                 # None without a wrapper; kept in the journal
    published = await store.publish(manifest, images, progress, key)
    published = await store.get("s1")
    await store.fetch(published, into, progress)
"""
