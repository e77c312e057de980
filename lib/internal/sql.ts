/** Short forms for the SQL of this folder. */
import type { Database, SqlValue } from "sql.js";

/** Runs a query and returns its rows. */
export function readRows(
  db: Database,
  sql: string,
  values: SqlValue[] = [],
): Record<string, SqlValue>[] {
  const statement = db.prepare(sql, values);
  const rows: Record<string, SqlValue>[] = [];
  try {
    while (statement.step()) rows.push(statement.getAsObject());
  } finally {
    statement.free();
  }
  return rows;
}

/** Runs a query and returns the first value of its first row as a number; 0 when there is none. */
export function readNumber(db: Database, sql: string, values: SqlValue[] = []): number {
  return Number(db.exec(sql, values)[0]?.values[0]?.[0] ?? 0);
}

/** True inside a transaction. sql.js has no function for it, but SQLite rejects a second BEGIN. */
export function isInTransaction(db: Database): boolean {
  try {
    db.run("BEGIN");
  } catch {
    return true;
  }
  db.run("ROLLBACK");
  return false;
}

const undoneWrites = new WeakMap<Database, number>();

/** Counts the rows that were written and not undone. SQLite's total_changes() also counts undone ones. */
export function countWrites(db: Database): number {
  return readNumber(db, "SELECT total_changes()") - (undoneWrites.get(db) ?? 0);
}

/** Sets the count of {@linkcode countWrites} back, after all writes since then were undone. */
export function resetWrites(db: Database, count: number): void {
  undoneWrites.set(db, readNumber(db, "SELECT total_changes()") - count);
}

/** Quotes a name, so that it can be a keyword or contain spaces. */
export function quoteName(name: string): string {
  return `"${name.replaceAll('"', '""')}"`;
}

/** The columns of a table in lower case, because SQLite ignores case in names; empty without the table. */
export function listColumns(db: Database, table: string): string[] {
  const sql = "SELECT lower(name) AS name FROM pragma_table_xinfo(?)";
  return readRows(db, sql, [table]).map(({ name }) => String(name));
}

/** Joins words as in a sentence: `a`, `a and b`, `a, b and c`. */
export function joinWords(words: readonly string[]): string {
  const last = words.at(-1) ?? "";
  return words.length < 2 ? last : `${words.slice(0, -1).join(", ")} and ${last}`;
}
