/** Finds text that is not valid UTF-8, for example from a CSV file in Latin-1. */
import type { Database, SqlValue } from "sql.js";
import { quoteName, readRows } from "./sql.ts";

/** The problem of a value that is not valid UTF-8. A message shows it after the column's name. */
export const INVALID_UTF8 = "is not valid UTF-8 (was the CSV Latin-1?)";

const UTF8 = new TextDecoder("utf-8", { fatal: true });

/** True if bytes are valid UTF-8. */
export function isValidUtf8(bytes: Uint8Array): boolean {
  try {
    UTF8.decode(bytes);
    return true;
  } catch {
    return false;
  }
}

/**
 * Lists the columns of a row whose stored bytes are not valid UTF-8. sql.js decodes invalid bytes
 * to U+FFFD without an error. If the decoded text were sent, Square would store a damaged name. If
 * it were saved, the original bytes in the file would be lost.
 * @param row the row as it was read, with its `local_id` as a text
 */
export function findInvalidUtf8(
  db: Database,
  table: string,
  row: Record<string, SqlValue>,
): Set<string> {
  // A valid text can contain U+FFFD too. So read the bytes of these columns, and check them.
  const suspects = Object.keys(row).filter((column) => String(row[column]).includes("\uFFFD"));
  if (suspects.length === 0) return new Set();
  const bytes = suspects.map(
    (column) => `CAST(${quoteName(column)} AS BLOB) AS ${quoteName(column)}`,
  );
  const sql = `SELECT ${bytes.join(", ")} FROM ${table} WHERE local_id = ?`;
  const [rowOfBytes = {}] = readRows(db, sql, [row.local_id ?? null]);
  const isInvalid = (column: string) => {
    const value = rowOfBytes[column];
    return value instanceof Uint8Array && !isValidUtf8(value);
  };
  return new Set(suspects.filter(isInvalid));
}
