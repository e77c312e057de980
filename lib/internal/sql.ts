/** Runs SQL in a database of sql.js. */
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

/** Runs a query and returns the first value of its first row as a number, or 0 without a row. */
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

// How many writes a rollback has undone, for each database.
const undoneWrites = new WeakMap<Database, number>();

/**
 * Counts the rows that were written since the database was opened. SQLite's total_changes() also
 * counts writes that a rollback has undone, so {@linkcode resetWrites} subtracts those.
 */
export function countWrites(db: Database): number {
  return readNumber(db, "SELECT total_changes()") - (undoneWrites.get(db) ?? 0);
}

/**
 * Makes countWrites return `count` again after a rollback. Otherwise the rolled-back writes would
 * count as changes, and the file would be saved although nothing has changed.
 * @param count the result of {@linkcode countWrites} before the writes that were rolled back
 */
export function resetWrites(db: Database, count: number): void {
  undoneWrites.set(db, readNumber(db, "SELECT total_changes()") - count);
}

/** Quotes a name, which can then be a keyword or contain spaces. */
export function quoteName(name: string): string {
  return `"${name.replaceAll('"', '""')}"`;
}

/** Lists the columns of a table as they were declared, or none if the table does not exist. */
export function listDeclaredColumns(db: Database, table: string): string[] {
  const sql = "SELECT name FROM pragma_table_xinfo(?)";
  return readRows(db, sql, [table]).map(({ name }) => String(name));
}

/** Lists the columns of a table in lower case, because SQL ignores case in names. */
export function listColumns(db: Database, table: string): string[] {
  return listDeclaredColumns(db, table).map((name) => name.toLowerCase());
}

/**
 * Finds a name that no table, view, index or trigger has, by adding underscores.
 * @param name the name to use if it is free
 */
export function findFreeName(db: Database, name: string): string {
  const sql = "SELECT count(*) FROM sqlite_master WHERE lower(name) = lower(?)";
  let freeName = name;
  while (readNumber(db, sql, [freeName]) > 0) freeName += "_";
  return freeName;
}
