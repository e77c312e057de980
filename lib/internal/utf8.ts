/** Finds text that is not valid UTF-8, for example from a Latin-1 CSV. */
import type { Database, SqlValue } from "sql.js";
import { isValidUtf8 } from "./normalize.ts";
import { quoteName, readRows } from "./sql.ts";

/**
 * Lists the columns of a row whose stored bytes are not valid UTF-8. sql.js decodes such bytes to U+FFFD. If the
 * decoded text were sent, Square would get the damaged name, and a save would replace the bytes in the file.
 * @param row the row as it was read, with its `local_id` as a text
 */
export function findInvalidUtf8(
  db: Database,
  table: string,
  row: Record<string, SqlValue>,
): Set<string> {
  // U+FFFD can also be a character of the text, so look at the bytes.
  const suspects = Object.keys(row).filter((column) => String(row[column]).includes("\uFFFD"));
  if (suspects.length === 0) return new Set();
  const bytes = suspects.map(
    (column) => `CAST(${quoteName(column)} AS BLOB) AS ${quoteName(column)}`,
  );
  const sql = `SELECT ${bytes.join(", ")} FROM ${table} WHERE local_id = ?`;
  const [raw = {}] = readRows(db, sql, [row.local_id ?? null]);
  const isInvalid = (column: string) => {
    const value = raw[column];
    return value instanceof Uint8Array && !isValidUtf8(value);
  };
  return new Set(suspects.filter(isInvalid));
}
