BEGIN TRANSACTION;
CREATE TABLE activations (
    generation INTEGER PRIMARY KEY AUTOINCREMENT,
    version TEXT NOT NULL,
    previous TEXT NOT NULL,
    activated_us INTEGER NOT NULL
);
CREATE TABLE events (
    event INTEGER PRIMARY KEY AUTOINCREMENT,
    user INTEGER NOT NULL,
    type INTEGER NOT NULL,
    time INTEGER NOT NULL,
    item_id TEXT,
    text INTEGER,
    event_id TEXT,
    attributes TEXT
);
INSERT INTO "events" VALUES(1,1,1,1700000000000000,NULL,1,'id-0','{"n": "0"}');
INSERT INTO "events" VALUES(2,3,2,1700000001000000,'item-1',NULL,'id-1','{"n": "1"}');
INSERT INTO "events" VALUES(3,2,1,1700000002000000,'item-2',NULL,'id-2','{"n": "2"}');
INSERT INTO "events" VALUES(4,1,1,1700000003000000,'item-3',2,'id-3','{"n": "3"}');
INSERT INTO "events" VALUES(5,3,1,1700000004000000,'item-0',NULL,'id-4','{"n": "4"}');
INSERT INTO "events" VALUES(6,2,3,1700000005000000,NULL,NULL,'id-5','{"n": "5"}');
INSERT INTO "events" VALUES(7,1,1,1700000006000000,'item-2',1,'id-6','{"n": "6"}');
INSERT INTO "events" VALUES(8,3,2,1700000007000000,'item-3',NULL,'id-7','{"n": "7"}');
INSERT INTO "events" VALUES(9,2,1,1700000008000000,'item-0',NULL,'id-8','{"n": "8"}');
INSERT INTO "events" VALUES(10,1,1,1700000009000000,'item-1',2,'id-9','{"n": "9"}');
INSERT INTO "events" VALUES(11,3,1,1700000010000000,NULL,NULL,'id-10','{"n": "10"}');
INSERT INTO "events" VALUES(12,2,3,1700000011000000,'item-3',NULL,'id-11','{"n": "11"}');
CREATE TABLE leases (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE models (
    version TEXT PRIMARY KEY,
    registered_us INTEGER NOT NULL,
    files TEXT NOT NULL,
    model TEXT NOT NULL,
    published INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE processes (
    process TEXT PRIMARY KEY,
    heartbeat_at REAL NOT NULL,
    generation INTEGER NOT NULL,
    note TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    response BLOB NOT NULL,
    created_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE texts (
    number INTEGER PRIMARY KEY,
    text_id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    events INTEGER NOT NULL,
    state INTEGER NOT NULL
);
INSERT INTO "texts" VALUES(1,'db77f8d75151d6c8c9414968e072195b','words 0',2,1);
INSERT INTO "texts" VALUES(2,'2b1ec5a6f5dd5610bcc2552e8f5dfbd7','words 1',2,0);
CREATE TABLE types (
    type INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    events INTEGER NOT NULL
);
INSERT INTO "types" VALUES(1,'view',8);
INSERT INTO "types" VALUES(2,'buy',2);
INSERT INTO "types" VALUES(3,'search',2);
CREATE TABLE users (
    user INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL UNIQUE
);
INSERT INTO "users" VALUES(1,'user-0');
INSERT INTO "users" VALUES(2,'user-2');
INSERT INTO "users" VALUES(3,'user-1');
CREATE INDEX events_of_user ON events (user, time, event);
CREATE UNIQUE INDEX events_event_id ON events (event_id) WHERE event_id IS NOT NULL;
CREATE INDEX texts_new ON texts (events) WHERE state = 0;
CREATE INDEX texts_orphaned ON texts (number) WHERE events = 0;
CREATE INDEX models_newest ON models (registered_us, version);
CREATE INDEX requests_created_at ON requests (created_at);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',12);
COMMIT;
