-- NULL: not known yet, the file's header says it
ALTER TABLE kv_files ADD COLUMN tenant TEXT;
ALTER TABLE chunks ADD COLUMN metadata TEXT;
ALTER TABLE contexts ADD COLUMN label TEXT;
ALTER TABLE contexts ADD COLUMN blend_tokens INTEGER;
