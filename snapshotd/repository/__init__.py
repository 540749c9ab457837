"""The store of snapshots that outlives a node: signed manifests over chunks named by their content.

The same layout in a directory and in a bucket::

    chunks/v2/<2 hex>/<64 hex>  a chunk, compressed and perhaps encrypted
    snapshots/<id>/manifest     the signed document; a snapshot exists when this does
    deleted/<id>/<digest>       a deleted snapshot's document, until garbage collection has seen it out
    damaged/<64 hex>            says of a chunk that it was found damaged, until it is sent again
    tmp/<name>                  what is being written; leftovers of a killed writer are garbage

How it is used::

    store = RemoteStore(objects, signer, trusted, wrapper=None, workers=8, grace=timedelta(hours=24))
    key = store.new_key("s1")                                 # None without a wrapper; kept in the journal
    published = await store.publish(manifest, images, progress, key)
    published = await store.get("s1")
    await store.fetch(published, into, progress)
"""
