INSERT INTO chunks VALUES
    ('', x'900a4469df00ccbfd0c145c6d1e4b7953dd0afafadd7534e3a4019e8d38fc663', '1.txt',
     'file', 'text 1', 50, 3);
INSERT INTO chunk_tags VALUES
    ('', x'900a4469df00ccbfd0c145c6d1e4b7953dd0afafadd7534e3a4019e8d38fc663', 'old');
INSERT INTO contexts VALUES ('', 'talk', 'blend', NULL, 3, 4);
INSERT INTO context_chunks VALUES
    ('', 'talk', 0, x'900a4469df00ccbfd0c145c6d1e4b7953dd0afafadd7534e3a4019e8d38fc663', 1,
     x'');
INSERT INTO turns VALUES ('', 'talk', 0, 'user', 'hi', x'', x'');
PRAGMA user_version = 1;
