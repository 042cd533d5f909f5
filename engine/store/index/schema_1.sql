CREATE TABLE chunks (
    tenant TEXT NOT NULL,
    id BLOB NOT NULL CHECK (length(id) = 32),
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    tokens INTEGER,
    created INTEGER NOT NULL,
    PRIMARY KEY (tenant, id)
) STRICT;

CREATE TABLE chunk_tags (
    tenant TEXT NOT NULL,
    id BLOB NOT NULL,
    tag TEXT NOT NULL,
    PRIMARY KEY (tenant, id, tag),
    FOREIGN KEY (tenant, id) REFERENCES chunks (tenant, id) ON DELETE CASCADE
) STRICT;

CREATE TABLE kv_files (
    kv_id BLOB NOT NULL PRIMARY KEY CHECK (length(kv_id) = 32),
    chunk BLOB NOT NULL CHECK (length(chunk) = 32),
    codec TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    raw_bytes INTEGER NOT NULL,
    created INTEGER NOT NULL,
    last_used INTEGER NOT NULL,
    uses INTEGER NOT NULL
) STRICT;

CREATE INDEX kv_files_by_chunk ON kv_files (chunk);

CREATE TABLE contexts (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    policy TEXT NOT NULL,
    system TEXT,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;

CREATE TABLE context_chunks (
    tenant TEXT NOT NULL,
    context TEXT NOT NULL,
    place INTEGER NOT NULL,
    chunk BLOB NOT NULL,
    active INTEGER NOT NULL,
    seen BLOB NOT NULL,
    PRIMARY KEY (tenant, context, place),
    FOREIGN KEY (tenant, context) REFERENCES contexts (tenant, name) ON DELETE CASCADE,
    FOREIGN KEY (tenant, chunk) REFERENCES chunks (tenant, id) ON DELETE CASCADE
) STRICT;

CREATE TABLE turns (
    tenant TEXT NOT NULL,
    context TEXT NOT NULL,
    place INTEGER NOT NULL,
    role TEXT NOT NULL,
    text TEXT NOT NULL,
    ids BLOB NOT NULL,
    seen BLOB NOT NULL,
    PRIMARY KEY (tenant, context, place),
    FOREIGN KEY (tenant, context) REFERENCES contexts (tenant, name) ON DELETE CASCADE
) STRICT;

CREATE TABLE leases (
    tenant TEXT NOT NULL,
    chunk BLOB NOT NULL,
    expires INTEGER NOT NULL,
    PRIMARY KEY (tenant, chunk),
    FOREIGN KEY (tenant, chunk) REFERENCES chunks (tenant, id) ON DELETE CASCADE
) STRICT;

CREATE TABLE statistics (
    key TEXT NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;

CREATE TABLE fingerprints (
    path BLOB NOT NULL PRIMARY KEY,
    size INTEGER NOT NULL,
    modified INTEGER NOT NULL,
    sha256 BLOB NOT NULL CHECK (length(sha256) = 32)
) STRICT;
